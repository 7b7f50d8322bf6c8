"""Container images: stacks of sealed layers, known by what they contain."""
