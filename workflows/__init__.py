"""Loops, files and printing over the pure core: fine-tuning, chatting, exporting, the face."""
