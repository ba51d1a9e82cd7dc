// The runtime as one unit of compilation, so that every check can be inlined.
#include "fibers.cpp"
#include "faults.cpp"
#include "memory_check.cpp"
#include "undefined.cpp"
#include "scheduler.cpp"
#include "launch.cpp"
