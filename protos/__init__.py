"""The contract of both planes, its generated code, and the small wire plumbing that they share."""
