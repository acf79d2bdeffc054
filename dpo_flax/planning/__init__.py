"""What a config costs on TPUs, by their compiler."""
