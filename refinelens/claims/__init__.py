"""Claims of papers, tested: a recipe says what is run and what is concluded from it, before it is run."""
