"""What a reply is worth: rewards by name, yours among them, and how they add up (rewards.py).

Needs a row and a text, nothing of models or training.
"""
