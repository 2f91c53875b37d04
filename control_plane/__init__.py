"""The stateless control plane: frontend, scheduler, block tables, prefix index."""
