"""What a run says of itself: its model card and its curves."""
