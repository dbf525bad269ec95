"""What the description of guests and policy says, checked on the controller."""
