"""Scores of generated answers: numbers, programs and chat, as the papers and lm-eval count them."""
