"""Where bytes are written durably and read: folders and object stores behind one interface, see ``store.Store``."""
