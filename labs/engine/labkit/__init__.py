"""The labs: reads their folders, gives each student values of their own, looks at what a system does, and grades it."""
