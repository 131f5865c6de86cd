"""Pseudo chains of thought for the cold start: writer.py writes them from a row's poses and checks what anybody writes; endpoint.py has
them written by a model behind an OpenAI-compatible address, which client.py asks."""
