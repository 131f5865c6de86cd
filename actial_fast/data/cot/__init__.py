"""Pseudo chains of thought for the cold start, in reading order: pairs.py finds the pairs behind viewpoint questions; asking.py says what a
model is told and asked (rollout/thoughts.py and rollout/batches.py have it replied to), poses.py writes without one; checking.py is the
check, with leaks.py and judge.py, which holds against the poses what reading.py finds in a text (by clauses.py, wording.py, vocabulary.py);
writer.py stores what passes; template.py is for the person who corrects the example."""
