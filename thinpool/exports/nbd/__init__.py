"""Layers over NBD: addresses and listeners (server), negotiation (handshake), TLS (tls); bytes are moved by csrc/nbd.c."""
