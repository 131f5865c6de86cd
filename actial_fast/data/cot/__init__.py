"""Pseudo chains of thought for the cold start: writer.py writes them from a row's poses, and checks and stores what anybody writes;
asking.py says what a model is asked for one (rollout/thoughts.py has it replied to)."""
