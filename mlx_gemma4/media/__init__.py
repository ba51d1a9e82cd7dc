"""Pictures and sounds: from files to what the towers read. Each file owns one kind; import from the file itself."""
