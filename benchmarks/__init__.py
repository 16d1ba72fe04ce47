"""Programs that measure this pipeline against others; each is one command, told in its docstring."""
