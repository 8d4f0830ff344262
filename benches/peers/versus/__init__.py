"""What side_by_side.py is made of: FusionLLM beside torch.distributed.pipelining on the same links."""
