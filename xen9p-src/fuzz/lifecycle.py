def fuzz(seed, lives):
    return "todo"
