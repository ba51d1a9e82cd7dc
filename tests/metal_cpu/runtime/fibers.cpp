// A stack per Metal thread and the switch between them: the registers that a function must preserve, nothing else.
#include "runtime.h"

constexpr uint64_t kStack = 128 << 10, kGuard = 16 << 10;  // the guard: a whole page on every machine

// Saves the running fiber's stack pointer in *save and continues the one whose stack pointer is `to`.
extern "C" void metal_cpu_switch(void** save, void* to);

#if defined(__x86_64__)
constexpr int kSavedWords = 6;
asm(R"(
.text
.globl metal_cpu_switch
metal_cpu_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
)");
#elif defined(__aarch64__)
constexpr int kSavedWords = 20;
asm(R"(
.text
.globl metal_cpu_switch
.p2align 2
metal_cpu_switch:
  sub sp, sp, #160
  stp x19, x20, [sp, #0]
  stp x21, x22, [sp, #16]
  stp x23, x24, [sp, #32]
  stp x25, x26, [sp, #48]
  stp x27, x28, [sp, #64]
  stp x29, x30, [sp, #80]
  stp d8, d9, [sp, #96]
  stp d10, d11, [sp, #112]
  stp d12, d13, [sp, #128]
  stp d14, d15, [sp, #144]
  mov x2, sp
  str x2, [x0]
  mov sp, x1
  ldp x19, x20, [sp, #0]
  ldp x21, x22, [sp, #16]
  ldp x23, x24, [sp, #32]
  ldp x25, x26, [sp, #48]
  ldp x27, x28, [sp, #64]
  ldp x29, x30, [sp, #80]
  ldp d8, d9, [sp, #96]
  ldp d10, d11, [sp, #112]
  ldp d12, d13, [sp, #128]
  ldp d14, d15, [sp, #144]
  add sp, sp, #160
  ret
)");
#else
#error "metal_cpu runs on x86-64 and arm64"
#endif

static char* stacks;

static char* stack_of(uint32_t index) { return stacks + index * (kStack + kGuard) + kGuard; }

static void make_stacks() {
  if (stacks) return;
  stacks = reserve(kMaxThreads * (kStack + kGuard));
  for (uint32_t i = 0; i < kMaxThreads; i++) mprotect(stack_of(i) - kGuard, kGuard, PROT_NONE);
}

static bool on_stack(uint32_t index, const char* p, uint64_t size) {
  return p >= stack_of(index) && p + size <= stack_of(index) + kStack;
}
static bool on_any_stack(const char* p) { return p >= stacks && p < stack_of(kMaxThreads); }

// The stack pointer of a fiber that will start in `entry`, which never returns.
static void* fresh_stack(uint32_t index, void (*entry)()) {
  void** sp = (void**)(stack_of(index) + kStack - 64);
  *--sp = nullptr;  // where `entry` would return to; keeps the stack aligned as after a call
#if defined(__x86_64__)
  *--sp = (void*)entry;
  for (int i = 0; i < kSavedWords; i++) *--sp = nullptr;
#else
  --sp;
  for (int i = 0; i < kSavedWords; i++) *--sp = nullptr;
  sp[11] = (void*)entry;  // x30, the return address
#endif
  return sp;
}
