"""The text road: how well a language model predicts running text while a method chooses its FFN neurons."""
