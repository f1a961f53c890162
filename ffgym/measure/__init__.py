"""How much smaller, faster and as good a saved model is: size, speed, memory, tasks."""
