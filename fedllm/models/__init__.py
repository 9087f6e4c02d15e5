"""What is trained: language models that are loaded, and the vision papers' models that are built."""
