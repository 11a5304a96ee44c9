from experiments.tiny_models import classify, problems, solve, table, tiny_bert, tiny_llama

__all__ = ["classify", "problems", "solve", "table", "tiny_bert", "tiny_llama"]
