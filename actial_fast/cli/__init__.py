"""The `actial` command: one module for each group of commands, which says what they take and runs them.

main.py only dispatches and turns the user's mistakes into one line; shared.py has what several groups need. Whatever is heavy is imported
where a command runs, so that help and errors come at once.
"""
