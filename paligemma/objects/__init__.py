"""What an answer says: boxes, labels, masks and scores; and how they are drawn, listed and exported."""
