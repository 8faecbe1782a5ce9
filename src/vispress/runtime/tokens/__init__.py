"""Keep track of tokens: which live at a depth, which are an image's, what each attends to."""
