"""Distilling Step-by-Step: the method, its student, and the programs that train and use it."""
