"""The engine process: the only one that holds models; HTTP workers talk to it over a socket."""
