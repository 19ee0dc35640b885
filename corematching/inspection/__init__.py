"""How we look inside a model for figures: evidence of single questions, overlays of kept patches."""
