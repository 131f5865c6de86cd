"""Rows, and the makers of rows: sources/ reads what there is, captures/ makes viewpoint questions from posed photographs, cot/ writes
chains of thought. Nothing here needs torch."""
