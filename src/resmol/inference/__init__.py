"""Generation: from token ids to text."""
