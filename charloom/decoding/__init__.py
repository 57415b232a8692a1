"""The inner half of the language model: one step, the sampling rules and a text in the making."""
