"""The `quire` command: asks a running stack, shows what operators want to see, or runs a stack."""
