"""Sources of rows (one file each), the stream over them, and the builders that make rows from captures."""
