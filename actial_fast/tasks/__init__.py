"""What a reply is worth: rewards by name, yours among them, and groups scored while others are sampled (rewards.py).

Needs a row and a text, nothing of models or training. calls.py makes slow calls: in threads and an event loop, with time-outs and retries.
verl.py has them called by verl.
"""
