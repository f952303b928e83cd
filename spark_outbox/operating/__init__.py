"""The functions behind the commands for operators."""
