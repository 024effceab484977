"""What stands behind each command of ``vmm``."""
