"""What ``patch`` knows of Hugging Face transformers; imported where a model is made of it."""
