"""What the trainer's parts do in a second, beside what others do."""
