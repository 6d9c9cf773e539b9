"""Comparisons of methods: which differences between runs are more than chance."""
