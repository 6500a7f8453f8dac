"""What stands between the package and the Hugging Face Hub: the remote-code bundle, export, model cards.

Nothing is re-exported; import from the module that holds the name, such as ``cognexis.hub.bundle``.
"""
