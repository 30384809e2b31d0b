"""How the bundled checkpoint was made: pictures of shapes, training from scratch, scores."""
