"""Bytes on disk to parameter trees and back: Hugging Face, PEFT, bitsandbytes and GGUF files."""
