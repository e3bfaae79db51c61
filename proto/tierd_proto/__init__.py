"""What travels between tierd and its clients, and the coding of tensors and certificates that both sides share."""
