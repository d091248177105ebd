"""Model files: found, checked and read in one place (rule R5). No torch; raw bytes come out as numpy views."""
