"""Operations that PyTorch lacks or computes slowly, each with its plain-torch reference."""
