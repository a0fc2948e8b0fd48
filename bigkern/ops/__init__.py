"""The ops, a package each: public function, checks, reference, backends, problems."""
