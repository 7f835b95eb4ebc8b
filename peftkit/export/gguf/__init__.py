"""GGUF files for llama.cpp and Ollama: weights, vocabulary, and the proof in llama.cpp itself."""
