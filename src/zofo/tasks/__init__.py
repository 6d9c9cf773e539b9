"""Tasks: rows from files and data sets, put into words, split, and scored by a metric."""
