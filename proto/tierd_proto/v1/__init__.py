"""Messages of the wire, version 1: generated from tierd.proto."""
