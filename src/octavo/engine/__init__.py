"""Floor 2: decides what runs next. Speaks only tokens; imports no tensor library."""
