"""extract.py's parts: the prompt, the endpoint, the output that survives a crash, and what is printed."""
